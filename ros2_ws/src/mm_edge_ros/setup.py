from glob import glob

from setuptools import setup

NAME = "mm_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/config", glob("config/*.xml")),
        (f"share/{NAME}/launch", glob("launch/*.launch.py") + glob("launch/*.yaml")),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="The mm_edge authors",
    maintainer_email="mm_edge@users.noreply.github.com",
    description="Runs mm_edge bundles on a robot: sensors in, actions and captions out; a watchdog, a simulator.",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            f"{node} = {NAME}.{node}:main"
            for node in (
                "edge_node",
                "watchdog_node",
                "caption_node",
                "events_node",
                "record_node",
                "view_node",
                "camera_node",
                "microphone_node",
                "search_node",
                "sim_node",
                "demo_node",
            )
        ]
    },
)
