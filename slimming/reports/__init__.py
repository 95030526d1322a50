"""Present figures: tables, plots, TensorBoard, HTML pages."""
