//! HBONE: pool, client, server, stream, relay.
