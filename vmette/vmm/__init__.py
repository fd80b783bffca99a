"""The virtual machine monitors."""
