//! Values: constructing one is validating it.
