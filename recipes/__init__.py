"""The only table from a recipe's name in a yaml to code. A recipe's ``build(cfg)`` returns a ready composer.Trainer."""

from recipes import supervised

RECIPES = {"supervised": supervised}
