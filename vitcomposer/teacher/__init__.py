"""The teacher of distillation and its stored answers."""
