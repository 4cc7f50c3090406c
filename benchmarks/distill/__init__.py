"""What a teacher costs a student's step, and what a small student gains from one."""
