"""Measures trained models: accuracy, confused classes, nearest neighbours, and where attention looks."""
