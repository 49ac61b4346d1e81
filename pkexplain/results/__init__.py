"""Results: plain data, shown as text, plots and an HTML report."""
