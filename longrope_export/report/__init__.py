"""What a folder holds (factors, searches, evaluations) as one self-contained HTML page and PNG figures."""
