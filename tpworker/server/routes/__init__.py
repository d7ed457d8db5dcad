"""What the server answers, a file for each kind; `add_…` puts the routes into an app."""
