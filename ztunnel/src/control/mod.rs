//! Updates in, snapshots out.
