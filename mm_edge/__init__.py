"""mm_edge: robots that hear, see, range, feel and are spoken to, in real time on an edge computer."""

__version__ = "0.1.0"
