"""From predictions to metrics, tables, pictures and reports."""
