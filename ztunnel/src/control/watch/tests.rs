//! Every way in which people and machines change a file is seen, once.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A directory of one test, gone when the test ends.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ztunnel-watch-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn pods(names: &[&str]) -> String {
    let mut text = String::from("pods:\n");
    for name in names {
        text.push_str(&format!(
            "- {{name: {name}, namespace: a, netns: /{name}}}\n"
        ));
    }
    text
}

fn names(state: &State) -> Vec<String> {
    state
        .pods
        .iter()
        .map(|pod| pod.pod.name.to_string())
        .collect()
}

/// The next change. Far longer than any of these waits, short of a hanging test run.
async fn next(source: &mut FileSource<State>) -> Result<State, Error> {
    tokio::time::timeout(Duration::from_secs(30), source.changed())
        .await
        .expect("a change is seen")
}

#[tokio::test]
async fn a_file_written_in_place_and_one_renamed_over_are_seen() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (state, mut source) = FileSource::open(&path).unwrap();
    assert_eq!(names(&state), ["a"]);

    fs::write(&path, pods(&["a", "b"])).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["a", "b"]);

    for round in ["c", "d"] {
        let other = directory.path(".mesh.yaml.swp");
        fs::write(&other, pods(&[round])).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(names(&next(&mut source).await.unwrap()), [round]);
    }
}

#[tokio::test]
async fn a_swapped_link_to_a_directory_is_seen_again_and_again() {
    let directory = Directory::new();
    let release = |name: &str, pod: &str| {
        fs::create_dir(directory.path(name)).unwrap();
        fs::write(directory.path(name).join("mesh.yaml"), pods(&[pod])).unwrap();
        symlink(name, directory.path("..tmp")).unwrap();
        fs::rename(directory.path("..tmp"), directory.path("..data")).unwrap();
    };
    release("..1", "a");
    symlink("..data/mesh.yaml", directory.path("mesh.yaml")).unwrap();
    let (state, mut source) = FileSource::open(directory.path("mesh.yaml")).unwrap();
    assert_eq!(names(&state), ["a"]);
    for (old, new, pod) in [("..1", "..2", "b"), ("..2", "..3", "c")] {
        release(new, pod);
        fs::remove_dir_all(directory.path(old)).unwrap();
        assert_eq!(names(&next(&mut source).await.unwrap()), [pod]);
    }
}

#[tokio::test]
async fn a_link_into_another_directory_is_followed_wherever_it_leads() {
    let (links, files) = (Directory::new(), Directory::new());
    fs::write(files.path("a.yaml"), pods(&["a"])).unwrap();
    fs::write(files.path("b.yaml"), pods(&["b"])).unwrap();
    symlink(files.path("a.yaml"), links.path("mesh.yaml")).unwrap();
    let (_, mut source) = FileSource::open(links.path("mesh.yaml")).unwrap();

    fs::write(files.path("a.yaml"), pods(&["a2"])).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["a2"]);

    symlink(files.path("b.yaml"), links.path("next")).unwrap();
    fs::rename(links.path("next"), links.path("mesh.yaml")).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["b"]);

    fs::write(files.path("b.yaml"), pods(&["b2"])).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["b2"]);
}

#[tokio::test]
async fn a_fault_is_told_once_and_the_next_good_content_is_taken() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (_, mut source) = FileSource::open(&path).unwrap();

    fs::write(&path, "pods: [x]\n").unwrap();
    assert!(matches!(
        next(&mut source).await,
        Err(Error::Invalid { line: 1, .. })
    ));
    fs::write(&path, "").unwrap();
    assert!(matches!(next(&mut source).await, Err(Error::Empty { .. })));
    fs::write(&path, b"pods: \xff\n").unwrap();
    assert!(matches!(
        next(&mut source).await,
        Err(Error::NotUtf8 { valid_up_to: 6, .. })
    ));
    fs::remove_file(&path).unwrap();
    assert!(matches!(next(&mut source).await, Err(Error::Read { .. })));
    fs::create_dir(&path).unwrap();
    assert!(matches!(
        next(&mut source).await,
        Err(Error::NotAFile { .. })
    ));
    fs::remove_dir(&path).unwrap();
    assert!(matches!(next(&mut source).await, Err(Error::Read { .. })));
    // The same as at the start, but not the same as just now.
    fs::write(&path, pods(&["a"])).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["a"]);
}

#[tokio::test]
async fn the_wait_may_be_cancelled_at_any_point_without_losing_the_change() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (_, mut source) = FileSource::open(&path).unwrap();
    fs::write(&path, pods(&["b"])).unwrap();
    for patience in (0..).step_by(7).map(Duration::from_millis) {
        if let Ok(state) = tokio::time::timeout(patience, source.changed()).await {
            assert_eq!(names(&state.unwrap()), ["b"]);
            break;
        }
    }
}

#[tokio::test]
async fn without_notifications_a_change_is_found_by_looking() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (_, mut source) = FileSource::open(&path).unwrap();
    source.watch = None;
    fs::write(&path, pods(&["b"])).unwrap();
    assert_eq!(names(&next(&mut source).await.unwrap()), ["b"]);
}

#[test]
fn the_same_content_written_again_is_no_change() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (_, source) = FileSource::open(&path).unwrap();
    let other = directory.path("other");
    fs::write(&other, pods(&["a"])).unwrap();
    fs::rename(&other, &path).unwrap();
    assert_ne!(Stamp::of(&path), source.seen.stamp);
    let Look::Same(seen) = look(&path, &source.seen, understand) else {
        panic!("a change was seen")
    };
    assert_eq!(seen.stamp, Stamp::of(&path), "the next look is cheap");
}

#[test]
fn a_file_that_stays_unreadable_is_one_fault() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    fs::write(&path, pods(&["a"])).unwrap();
    let (_, source) = FileSource::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let Look::New(seen, Err(Error::Read { .. })) = look(&path, &source.seen, understand) else {
        panic!("no fault")
    };
    assert!(matches!(look(&path, &seen, understand), Look::Same(_)));
}

#[test]
fn a_start_without_a_valid_file_is_an_error() {
    let directory = Directory::new();
    let path = directory.path("mesh.yaml");
    assert!(matches!(FileSource::open(&path), Err(Error::Read { .. })));
    fs::create_dir(&path).unwrap();
    assert!(matches!(
        FileSource::open(&path),
        Err(Error::NotAFile { .. })
    ));
    let bad = directory.path("bad.yaml");
    fs::write(&bad, "workload: []").unwrap();
    assert!(matches!(FileSource::open(&bad), Err(Error::Invalid { .. })));
    let huge = directory.path("huge.yaml");
    File::create(&huge)
        .unwrap()
        .set_len(MAX_FILE_BYTES + 1)
        .unwrap();
    assert!(matches!(
        FileSource::open(&huge),
        Err(Error::TooLarge { .. })
    ));
}
