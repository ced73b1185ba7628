//! Environment and file to Config.
