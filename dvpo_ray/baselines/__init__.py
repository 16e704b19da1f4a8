"""What DVPO is measured against: a baseline is another set of roles and another advantage on the same loop."""
