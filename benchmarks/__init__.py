"""Claims about warmctl, one file each, and the problems that they share."""
