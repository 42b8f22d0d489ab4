"""Parts of the diagnosis as a page: what Python writes, and the frame, style and script that it goes into."""
