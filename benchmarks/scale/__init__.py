"""How a run grows: two ranks against one as measured, and many as computed."""
