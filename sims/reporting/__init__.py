"""What pages are made of: report.html, sweep.html."""
