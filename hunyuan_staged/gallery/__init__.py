"""One page that shows all jobs below a folder."""
