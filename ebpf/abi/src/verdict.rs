//! Every verdict that the kernel programs count: its place in the counter map and its label.
//! It never decides anything.

macro_rules! verdicts {
    ($(#[$doc:meta])* $name:ident { $($(#[$why:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$doc])*
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$why])* $variant,)+
        }

        impl $name {
            /// All of them, in the order of their index.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];
            /// Entries of the counter map.
            pub const COUNT: u32 = {
                let names: &[&str] = &[$($label,)+];
                #[expect(
                    clippy::as_conversions,
                    clippy::cast_possible_truncation,
                    reason = "a handful of variants"
                )]
                let count = names.len() as u32;
                count
            };

            /// The entry of the counter map.
            pub const fn index(self) -> u32 {
                #[expect(clippy::as_conversions, reason = "a fieldless enum of u32")]
                let index = self as u32;
                index
            }

            /// The label as exported.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)+
                }
            }
        }
    };
}

verdicts! {
    /// What `connect4`, `connect6` and `setsockopt` decided about a TCP socket of an enrolled pod, and
    /// `connect` and `sendmsg` about a question to a resolver.
    ConnectVerdict {
        /// Bound to `lo`: it reaches us or nobody.
        Captured = "captured",
        /// The destination is loopback or unspecified: it stays in the pod.
        Loopback = "loopback",
        /// A socket of the node process.
        OwnSocket = "own_socket",
        /// The pod dials itself.
        OwnAddress = "own_address",
        /// The destination port is excluded.
        ExcludedPort = "excluded_port",
        /// The destination network is excluded.
        ExcludedCidr = "excluded_cidr",
        /// The socket could not be bound to `lo`: refused.
        BindFailed = "bind_failed",
        /// The socket was past its connect and should have left `lo`: refused.
        RebindRefused = "rebind_refused",
        /// A question to a resolver: it reaches us or nobody.
        DnsCaptured = "dns_captured",
        /// A question to a resolver that could not be given a stand-in: refused.
        DnsRefused = "dns_refused",
    }
}

verdicts! {
    /// What `sk_lookup` decided about a packet that looks for a listener in its pod. A packet of a
    /// closed connection looks for a listener too, so these count lookups, not connections.
    LookupVerdict {
        /// Captured, given to a worker.
        Outbound = "outbound",
        /// Captured, and nobody listens: unanswered, so that the connection waits.
        OutboundNoListener = "outbound_no_listener",
        /// From loopback to somewhere else: a connection that found no address to leave with. Dropped,
        /// so that a dial of ours that went astray never comes back to us.
        LoopRefused = "loop_refused",
        /// A question to a resolver, given to a worker.
        Dns = "dns",
        /// A question to a resolver, and nobody listens: refused.
        DnsNoListener = "dns_no_listener",
        /// Inside the pod: loopback, our own dial to the application, or the pod dialling itself.
        InsidePod = "inside_pod",
        /// HBONE, given to a worker.
        Hbone = "hbone",
        /// HBONE, and nobody listens: refused.
        HboneNoListener = "hbone_no_listener",
        /// The local port is excluded: straight to the application.
        ExcludedPort = "excluded_port",
        /// The source is excluded: straight to the application.
        ExcludedCidr = "excluded_cidr",
        /// Plaintext that no policy can admit: refused.
        PlaintextDropped = "plaintext_dropped",
        /// Plaintext, given to a worker.
        PlaintextProxied = "plaintext_proxied",
        /// Plaintext for a worker, and nobody listens: refused.
        PlaintextNoListener = "plaintext_no_listener",
        /// Plaintext, straight to the application.
        PlaintextPassed = "plaintext_passed",
        /// The kernel did not take our choice of listener: refused.
        AssignFailed = "assign_failed",
    }
}
