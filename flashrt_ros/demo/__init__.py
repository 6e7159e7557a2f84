"""The demo: a simulated arm, a live monitor with a report, and a bag recorder."""
