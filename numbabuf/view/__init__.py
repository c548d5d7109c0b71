"""What people look at: tables, HTML, plots, timelines and the report. Nothing below this room imports it."""
