"""The experiments behind the defaults and the claims, each one a command that ends in a table, a plot and a JSON file."""
