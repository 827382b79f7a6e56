"""What trains each recipe: its model, its loss and its metrics, on its data."""
