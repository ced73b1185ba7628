//! What outlives a process: adoption, replacement, collection, release, and pins that are broken.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use ebpf_abi::{MAX_PODS, OutboundRules};
use ztunnel::capture::{Capture, Error, Netns, preflight, release_all};

use crate::world::{
    Enrolled, PEER4, PORT, Sniffer, World, accept, at, ip, only, settings, spawn_in,
};

#[test]
fn this_machine_passes_preflight() {
    let world = World::new();
    preflight(&world.params(1)).unwrap();
}

#[test]
fn a_new_process_adopts_the_pods_of_the_old_one() {
    let world = World::new();
    let server = world.peer_server();
    let before = world.configuration();
    let first = world.enrolled(&settings());
    let cookie = first.pod.cookie();
    let after = world.configuration();
    assert_ne!(before, after);
    drop(first);

    let waiting = world.pod_connects(at(PEER4, PORT));
    let capture = world.start();
    assert_eq!(only(&capture), cookie);
    let second = Enrolled::new(capture, &world, &settings());
    accept(&second.listeners.outbound);
    drop(waiting.join().unwrap().unwrap());
    assert_eq!(second.connects("captured"), 1, "the counters live on");
    assert_eq!(server.served(), 0);
    assert_eq!(world.configuration(), after, "nothing is added twice");
}

#[test]
fn listeners_move_to_the_new_process_while_the_old_one_lives() {
    let world = World::new();
    let old = world.enrolled(&settings());
    let new = Enrolled::new(world.start(), &world, &settings());
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&new.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    drop(old);
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&new.listeners.outbound);
    drop(client.join().unwrap().unwrap());
}

#[test]
fn no_connection_leaks_while_programs_are_swapped() {
    let world = World::new();
    let server = world.peer_server();
    drop(world.enrolled(&settings()));
    let mut sniffer = Sniffer::on_peer(&world);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let load = spawn_in(&world.pod(), move || {
        let mut attempts = 0;
        while !stopped.load(Ordering::SeqCst) {
            let socket = socket2::Socket::new(
                socket2::Domain::IPV4,
                socket2::Type::STREAM.nonblocking(),
                None,
            )
            .unwrap();
            socket.connect(&at(PEER4, PORT).into()).unwrap_err();
            attempts += 1;
        }
        attempts
    });
    for round in 0..6 {
        if round % 2 == 1 {
            make_foreign(&world);
        }
        let enrolled = Enrolled::new(world.start(), &world, &settings());
        drop(enrolled);
    }
    stop.store(true, Ordering::SeqCst);
    assert!(load.join().unwrap() > 100);
    assert_eq!(sniffer.tcp(PORT), [""; 0]);
    assert_eq!(server.served(), 0);
}

#[test]
fn pins_of_another_abi_are_replaced_closed() {
    let world = World::new();
    let server = world.peer_server();
    let cookie = world.enrolled(&settings()).pod.cookie();
    make_foreign(&world);
    let capture = world.start();
    assert_eq!(only(&capture), cookie);
    // Captured before anybody enrolled it again.
    let waiting = world.pod_connects(at(PEER4, PORT));
    let enrolled = Enrolled::new(capture, &world, &settings());
    accept(&enrolled.listeners.outbound);
    drop(waiting.join().unwrap().unwrap());
    assert_eq!(server.served(), 0);
    assert_eq!(generations(&world).len(), 1, "the old pins are gone");
}

#[test]
fn sockets_of_the_old_process_stay_exempt_across_a_replacement() {
    let world = World::new();
    let _server = world.peer_server();
    let old = world.enrolled(&settings());
    make_foreign(&world);
    let new = Enrolled::new(world.start(), &world, &settings());
    let socket = old
        .pod
        .dialer(&settings())
        .upstream_socket(PEER4.parse().unwrap())
        .unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.connect(&at(PEER4, PORT).into()).unwrap();
    assert_eq!(new.connects("own_socket"), 1);
}

#[test]
fn broken_pins_are_replaced_closed() {
    for broken in ["PODS", "CIDRS", "OURS", "connect4", "CONNECT_VERDICTS"] {
        let world = World::new();
        let server = world.peer_server();
        let cookie = world.enrolled(&settings()).pod.cookie();
        fs::remove_file(generations(&world)[0].join(broken)).unwrap();
        let capture = world.start();
        assert_eq!(only(&capture), cookie, "{broken}");
        let waiting = world.pod_connects(at(PEER4, PORT));
        let enrolled = Enrolled::new(capture, &world, &settings());
        accept(&enrolled.listeners.outbound);
        drop(waiting.join().unwrap().unwrap());
        assert_eq!(server.served(), 0, "{broken}");
    }
}

#[test]
fn a_broken_pod_is_replaced() {
    for broken in ["LISTENERS", "POD", "link", "LOOKUP_VERDICTS"] {
        let world = World::new();
        let cookie = world.enrolled(&settings()).pod.cookie();
        let pin = generations(&world)[0].join(format!("pods/{cookie}/{broken}"));
        fs::remove_file(&pin).unwrap();
        let enrolled = Enrolled::new(world.start(), &world, &settings());
        let client = world.pod_connects(at(PEER4, PORT));
        accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
        assert!(pin.exists(), "{broken}");
    }
}

#[test]
fn what_a_crash_left_unfinished_is_removed() {
    let world = World::new();
    let enrolled = world.enrolled(&settings());
    let generation = generations(&world).remove(0);
    let leftovers = [
        world.pin_dir.join("tmp-node"),
        generation.join("pods/tmp-1"),
    ];
    for leftover in &leftovers {
        fs::create_dir(leftover).unwrap();
    }
    drop(enrolled);
    let capture = world.start();
    assert!(leftovers.iter().all(|leftover| !leftover.exists()));
    only(&capture);
}

#[test]
fn a_pod_whose_namespace_is_gone_is_collected() {
    let world = World::new();
    drop(world.enrolled(&settings()));
    let capture = world.start();
    let cookie = only(&capture);
    assert_eq!(capture.collect().unwrap(), []);
    ip(&format!("netns del {}", world.pod()));
    // The kernel takes a namespace down in its own time and tells nobody.
    let collected = (0..2400)
        .map(|_| {
            thread::park_timeout(Duration::from_millis(50));
            capture.collect().unwrap()
        })
        .find(|collected| !collected.is_empty())
        .unwrap_or_default();
    assert_eq!(collected, [cookie]);
    assert_eq!(capture.enrolled().unwrap(), []);
    assert_eq!(pods(&world).keys().count(), 0);
}

#[test]
fn release_undoes_everything_of_a_pod() {
    let world = World::new();
    let _server = world.peer_server();
    ip(&format!("-n {} link set lo up", world.pod()));
    let before = world.configuration();
    let enrolled = world.enrolled(&settings());
    assert_ne!(world.configuration(), before);
    enrolled.capture.release(enrolled.pod.cookie()).unwrap();
    assert_eq!(world.configuration(), before);
    assert_eq!(enrolled.capture.enrolled().unwrap(), []);
    assert!(matches!(
        enrolled.pod.update(&settings()),
        Err(Error::NotEnrolled { .. })
    ));
    drop(world.pod_connects(at(PEER4, PORT)).join().unwrap().unwrap());
    // Again, and of a pod that never was.
    enrolled.capture.release(enrolled.pod.cookie()).unwrap();
}

#[test]
fn release_all_undoes_what_processes_left_behind() {
    let world = World::new();
    let _server = world.peer_server();
    ip(&format!("-n {} link set lo up", world.pod()));
    let before = world.configuration();
    let cookie = world.enrolled(&settings()).pod.cookie();
    let released = release_all(&world.pin_dir).unwrap();
    assert_eq!(released.pods, [cookie]);
    assert_eq!(released.unreachable, []);
    assert_eq!(world.configuration(), before);
    assert!(!world.pin_dir.exists());
    drop(world.pod_connects(at(PEER4, PORT)).join().unwrap().unwrap());
    assert_eq!(release_all(&world.pin_dir).unwrap().pods, []);
}

#[test]
fn release_leaves_a_sysctl_that_was_on_before() {
    let world = World::new();
    ip(&format!("-n {} link set lo up", world.pod()));
    world.in_pod(|| fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").unwrap());
    let before = world.configuration();
    let enrolled = world.enrolled(&settings());
    enrolled.capture.release(enrolled.pod.cookie()).unwrap();
    assert_eq!(world.configuration(), before);
}

#[test]
fn one_pod_too_many_is_refused_and_left_as_it_was() {
    let world = World::new();
    ip(&format!("-n {} link set lo up", world.pod()));
    let before = world.configuration();
    let capture = world.start();
    let mut pods = pods(&world);
    for cookie in 0..MAX_PODS {
        pods.insert(u64::MAX - u64::from(cookie), OutboundRules::default(), 0)
            .unwrap();
    }
    let refused = capture.enrol(&world.netns(), &settings()).unwrap_err();
    assert!(
        matches!(refused, Error::PodsFull { pods: MAX_PODS }),
        "{refused}"
    );
    assert_eq!(world.configuration(), before);
    assert_eq!(capture.enrolled().unwrap(), []);
}

#[test]
fn the_nodes_own_namespace_is_never_enrolled() {
    let refused = Netns::open(&PathBuf::from("/proc/self/ns/net")).unwrap_err();
    assert!(matches!(refused, Error::NetnsOwn), "{refused}");
    let refused = Netns::open(&PathBuf::from("/proc/self/ns/uts")).unwrap_err();
    assert!(matches!(refused, Error::NetnsOpen { .. }), "{refused}");
}

#[test]
fn a_pipe_in_the_place_of_a_namespace_holds_nobody() {
    let pipe = std::env::temp_dir().join(format!("ztbpf{}-pipe", std::process::id()));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let refused = Netns::open(&pipe).unwrap_err();
    fs::remove_file(&pipe).unwrap();
    assert!(matches!(refused, Error::NetnsOpen { .. }), "{refused}");
}

#[test]
fn a_namespace_is_gone_only_from_a_path_that_can_be_looked_at() {
    let world = World::new();
    let netns = world.netns();
    let path = world.pod_path();
    assert!(netns.still_at(&path));
    assert!(!netns.still_at(&path.with_extension("missing")));
    assert!(!netns.still_at(&path.join("below")));
    assert!(!netns.still_at(&PathBuf::from("/run/netns").join(world.peer())));
    assert!(netns.still_at(&PathBuf::from("/").join("x".repeat(300))));
}

#[test]
fn a_pod_of_another_node_process_is_refused_and_left_as_it_was() {
    let (world, other) = (World::new(), World::new());
    let first = world.enrolled(&settings());
    let before = world.configuration();
    let capture = other.start();
    let refused = capture.enrol(&world.netns(), &settings()).unwrap_err();
    assert!(matches!(refused, Error::PodTaken), "{refused}");
    assert_eq!(world.configuration(), before);
    assert_eq!(capture.enrolled().unwrap(), []);
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&first.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    // Without the other it is anybody's.
    first.capture.release(first.pod.cookie()).unwrap();
    let (pod, _listeners) = capture.enrol(&world.netns(), &settings()).unwrap();
    capture.release(pod.cookie()).unwrap();
}

#[test]
fn two_node_processes_share_a_kernel() {
    let (one, other) = (World::new(), World::new());
    let (first, second) = (one.enrolled(&settings()), other.enrolled(&settings()));
    for (world, enrolled) in [(&one, &first), (&other, &second)] {
        let client = world.pod_connects(at(PEER4, PORT));
        accept(&enrolled.listeners.outbound);
        drop(client.join().unwrap().unwrap());
        assert_eq!(enrolled.connects("captured"), 1);
    }
    drop(Capture::start(&one.params(1)).unwrap());
}

#[test]
fn the_pins_of_a_living_node_are_served_by_that_node_only() {
    let world = World::new();
    let first = world.enrolled(&settings());
    let elsewhere = || {
        let params = world.params(1);
        world.in_peer(move || Capture::start(&params).map(drop))
    };
    let refused = elsewhere().unwrap_err();
    assert!(matches!(refused, Error::PinsTaken { .. }), "{refused}");
    assert!(refused.to_string().contains("BPF_PIN_DIR"), "{refused}");
    // Its successor comes while it leaves.
    let second = Enrolled::new(world.start(), &world, &settings());
    drop(first);
    let refused = elsewhere().unwrap_err();
    assert!(matches!(refused, Error::PinsTaken { .. }), "{refused}");
    let refused = release_all(&world.pin_dir).unwrap_err();
    assert!(matches!(refused, Error::PinsServed { .. }), "{refused}");
    let client = world.pod_connects(at(PEER4, PORT));
    accept(&second.listeners.outbound);
    drop(client.join().unwrap().unwrap());
    drop(second);
    elsewhere().unwrap();
    elsewhere().unwrap();
    drop(world.start());
}

#[test]
fn release_all_touches_nothing_but_our_pins() {
    let world = World::new();
    drop(world.start());
    let others = ["tmp-other", "tmp-", "abi", "node-x"].map(|name| world.pin_dir.join(name));
    for other in &others {
        fs::create_dir(other).unwrap();
    }
    assert!(release_all(&world.pin_dir).unwrap().found);
    assert!(others.iter().all(|other| other.exists()));
    assert_eq!(
        fs::read_dir(&world.pin_dir).unwrap().count(),
        others.len(),
        "all of ours is gone"
    );
    fs::remove_dir_all(&world.pin_dir).unwrap();
    assert!(!release_all(&world.pin_dir).unwrap().found);

    let disk = std::env::temp_dir().join(world.pod());
    fs::create_dir_all(disk.join("abi1-gen1/pods")).unwrap();
    let refused = release_all(&disk).unwrap_err();
    assert!(matches!(refused, Error::PinsElsewhere { .. }), "{refused}");
    let refused = release_all(&disk.join("missing")).unwrap_err();
    assert!(matches!(refused, Error::PinsElsewhere { .. }), "{refused}");
    assert!(disk.join("abi1-gen1/pods").exists());
    fs::remove_dir_all(&disk).unwrap();
}

/// As if another version had pinned them.
pub(crate) fn make_foreign(world: &World) {
    let dir = generations(world).remove(0);
    let name = dir.file_name().unwrap().to_str().unwrap();
    let number = name.split_once("-gen").unwrap().1;
    fs::rename(&dir, world.pin_dir.join(format!("abi999-gen{number}"))).unwrap();
}

pub(crate) fn generations(world: &World) -> Vec<PathBuf> {
    fs::read_dir(&world.pin_dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("abi")
        })
        .collect()
}

fn pods(world: &World) -> HashMap<MapData, u64, OutboundRules> {
    let pin = generations(world).remove(0).join("PODS");
    HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
}
