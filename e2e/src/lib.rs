//! Tests on a local real cluster.
