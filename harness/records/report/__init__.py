"""report.html: numbers, charts and pictures of one run or several."""
