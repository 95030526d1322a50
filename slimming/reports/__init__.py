"""Figures -> people: tables, plots, TensorBoard, pages."""
