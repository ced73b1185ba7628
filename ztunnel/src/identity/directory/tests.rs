//! The directory of an authority: modes, races and broken files.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::testing::Scratch;
use super::*;

fn pair(text: &str) -> Pair {
    Pair {
        certificate: format!("certificate {text}"),
        key: format!("key {text}"),
    }
}

fn never() -> Result<Pair, Error> {
    panic!("there is a pair already")
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_new_pair_is_private_and_stays() {
    let scratch = Scratch::new();
    let path = scratch.path().join("new");
    let directory = Directory::new(&path);
    directory.load_or_create(|| Ok(pair("one"))).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&directory.key()), 0o600);
    let again = directory.load_or_create(never).unwrap();
    assert_eq!(again.key, "key one");
    assert_eq!(names(&path), [LOCK, "root-cert.pem", "root-key.pem"]);
}

#[test]
fn processes_that_start_at_once_end_with_one_root() {
    let scratch = Scratch::new();
    let (made, start) = (AtomicU32::new(0), Barrier::new(16));
    let keys: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|n| {
                let (made, start, path) = (&made, &start, scratch.path());
                scope.spawn(move || {
                    start.wait();
                    Directory::new(path)
                        .load_or_create(|| {
                            made.fetch_add(1, Ordering::Relaxed);
                            Ok(pair(&n.to_string()))
                        })
                        .unwrap()
                        .key
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(made.load(Ordering::Relaxed), 1);
    assert!(keys.iter().all(|key| *key == keys[0]));
}

#[test]
fn a_crash_leaves_nothing_or_what_the_next_start_completes() {
    // Before the first rename.
    let scratch = Scratch::new();
    let directory = Directory::new(scratch.path());
    write_synced(&scratch.path().join(NEW_KEY), "key lost").unwrap();
    write_synced(&directory.unfinished(), "certificate lost").unwrap();
    let made = directory.load_or_create(|| Ok(pair("new"))).unwrap();
    assert_eq!(
        (&*made.key, &*made.certificate),
        ("key new", "certificate new")
    );
    assert_eq!(
        names(scratch.path()),
        [LOCK, "root-cert.pem", "root-key.pem"]
    );

    // Between the two.
    let scratch = Scratch::new();
    let directory = Directory::new(scratch.path());
    write_synced(&directory.key(), "key kept").unwrap();
    write_synced(&directory.unfinished(), "certificate kept").unwrap();
    let kept = directory.load_or_create(never).unwrap();
    assert_eq!(
        (&*kept.key, &*kept.certificate),
        ("key kept", "certificate kept")
    );
}

#[test]
fn half_a_pair_is_refused_and_kept() {
    for (present, missing) in [
        ("root-cert.pem", "root-key.pem"),
        ("root-key.pem", "root-cert.pem"),
    ] {
        let scratch = Scratch::new();
        write_synced(&scratch.path().join(present), "half").unwrap();
        let error = Directory::new(scratch.path())
            .load_or_create(never)
            .err()
            .unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::CaIncomplete { .. }), "{text}");
        assert!(text.contains(present) && text.contains(missing), "{text}");
        assert!(scratch.path().join(present).exists());
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    for mode in [0o644, 0o640, 0o604, 0o620] {
        let scratch = Scratch::new();
        let directory = Directory::new(scratch.path());
        directory.load_or_create(|| Ok(pair("one"))).unwrap();
        fs::set_permissions(directory.key(), fs::Permissions::from_mode(mode)).unwrap();
        let error = directory.load_or_create(never).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::CaKeyExposed { .. }), "{text}");
        assert!(
            text.contains("root-key.pem") && text.contains("chmod 600"),
            "{text}"
        );
    }
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    for (mode, good) in [
        (0o775, false),
        (0o707, false),
        (0o777, false),
        (0o755, true),
        (0o1777, true),
    ] {
        for new in [true, false] {
            let scratch = Scratch::new();
            let directory = Directory::new(scratch.path());
            if !new {
                directory.load_or_create(|| Ok(pair("one"))).unwrap();
            }
            fs::set_permissions(scratch.path(), fs::Permissions::from_mode(mode)).unwrap();
            let loaded = directory.load_or_create(|| Ok(pair("one")));
            assert_eq!(loaded.is_ok(), good, "{mode:o}");
            if let Err(error) = loaded {
                let exposed =
                    matches!(error, Error::CaDirectoryExposed { mode: m, .. } if m == mode);
                assert!(exposed, "{error}");
                assert!(error.to_string().contains("chmod go-w"), "{error}");
            }
        }
    }
}

#[test]
fn a_pipe_a_device_and_an_endless_file_are_refused_at_once() {
    let scratch = Scratch::new();
    let directory = Directory::new(scratch.path());
    directory.load_or_create(|| Ok(pair("one"))).unwrap();
    let certificate = directory.certificate();
    let refused = || {
        let error = directory.load_or_create(never).err().unwrap();
        assert!(matches!(error, Error::CaIo { .. }), "{error}");
        assert!(error.to_string().contains("root-cert.pem"), "{error}");
        fs::remove_file(&certificate).unwrap();
    };
    fs::remove_file(&certificate).unwrap();
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
    nix::unistd::mkfifo(&certificate, mode).unwrap();
    refused();
    std::os::unix::fs::symlink("/dev/zero", &certificate).unwrap();
    refused();
    let file = File::create(&certificate).unwrap();
    file.set_len(FILE_BYTES + 1).unwrap();
    refused();
    let file = File::create(&certificate).unwrap();
    file.set_len(FILE_BYTES).unwrap();
    assert!(directory.load_or_create(never).is_ok());
}

#[test]
fn only_root_and_we_own_what_counts() {
    let scratch = Scratch::new();
    let found = fs::metadata(scratch.path()).unwrap();
    ours(scratch.path(), &found).unwrap();
    ours(Path::new("/"), &fs::metadata("/").unwrap()).unwrap();
    // Only root can make another the owner; as anybody else there is nothing to show.
    if std::os::unix::fs::chown(scratch.path(), Some(12_345), None).is_ok() {
        let error = Directory::new(scratch.path()).load_or_create(never);
        let error = error.err().unwrap();
        assert!(
            matches!(error, Error::CaOwnedByOther { owner: 12_345, .. }),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_be_read_or_written_is_named_with_its_remedy() {
    let scratch = Scratch::new();
    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    fs::create_dir(scratch.path().join("root-key.pem")).unwrap();
    fs::write(scratch.path().join("root-cert.pem"), [0xff, 0xfe]).unwrap();
    for (path, named) in [
        (file.join("below"), "file"),
        (file.clone(), "file"),
        (scratch.path().to_owned(), "root-key.pem"),
    ] {
        let error = Directory::new(&path).load_or_create(never).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::CaIo { .. }), "{text}");
        assert!(text.contains(named), "{text}");
    }
    for (kind, remedy) in [
        (io::ErrorKind::StorageFull, "free space"),
        (io::ErrorKind::PermissionDenied, "own it"),
        (io::ErrorKind::ReadOnlyFilesystem, "existing pair"),
    ] {
        let text = failed("write", &file, kind.into()).to_string();
        assert!(text.contains(remedy), "{text}");
    }
}

#[test]
fn a_pair_that_cannot_be_made_leaves_nothing_that_counts() {
    let scratch = Scratch::new();
    let directory = Directory::new(scratch.path());
    let failure = || Err(Error::CaLocked(PathBuf::new()));
    assert!(directory.load_or_create(failure).is_err());
    directory.load_or_create(|| Ok(pair("later"))).unwrap();
}
