"""What the program must know about a network, and how it computes one."""
