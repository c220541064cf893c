"""What is wrong with experts, or worth knowing, from each kind of evidence."""
