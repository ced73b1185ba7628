//! A snapshot and a query in, a route out; pure.
