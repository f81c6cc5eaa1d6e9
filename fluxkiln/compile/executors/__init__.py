"""What runs the parts of a bundle, one file per runtime. A module may be imported where its library is missing."""
