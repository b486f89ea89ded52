"""ROS 2 nodes around mm_edge: the only code of the project that imports rclpy."""
