"""What is measured of trained policies, and how it is drawn and written."""
