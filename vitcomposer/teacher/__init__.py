"""Asks the teacher of a distillation for its answers, or looks up those that were stored."""
