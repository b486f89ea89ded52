"""A MuJoCo world for a robot with five senses: the demo, the training data and the evaluation all happen here."""
