"""Looks at a folder of photographs before training: what it holds, and the settings that fit it."""
