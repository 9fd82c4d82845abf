"""What drives many trainings, or looks before one."""
