use std::os::unix::net::UnixStream;

use super::*;
use crate::dirty::Names;

const LIMIT: Duration = Duration::from_secs(10);

fn watched() -> (tempfile::TempDir, Watch) {
    let dir = tempfile::tempdir().unwrap();
    make_cookie_dir(dir.path()).unwrap();
    let watch = Watch::start(Backend::Inotify, vec![dir.path().canonicalize().unwrap().into()], Box::new(|| ())).unwrap();
    (dir, watch)
}

/// With the helper in a thread; `None` where fanotify isn't to be had.
fn marked() -> Option<(tempfile::TempDir, Watch)> {
    marked_through().map(|(dir, watch, _)| (dir, watch))
}

/// As [`marked`], with the link to the helper.
fn marked_through() -> Option<(tempfile::TempDir, Watch, UnixStream)> {
    let dir = tempfile::tempdir().unwrap();
    make_cookie_dir(dir.path()).unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (ours, its) = UnixStream::pair().unwrap();
    let roots = vec![root.clone()];
    std::thread::spawn(move || run_helper(&roots, None, Told::Processes, its));
    let helper = Arc::new(Helper::new(ours.try_clone().unwrap()).unwrap());
    match Watch::start(Backend::Fanotify(helper), vec![root.into()], Box::new(|| ())) {
        Ok(watch) => Some((dir, watch, ours)),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

fn names(watch: &Watch, dir: &str) -> Vec<(String, Hint)> {
    let hints = watch.dirty().take();
    match hints.dirs.get(&(RootId(0), RelPath::new(dir.as_bytes()).unwrap())) {
        Some(Names::Some(set)) => set.iter().map(|(n, h)| (String::from_utf8(n.to_vec()).unwrap(), *h)).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn after_the_barrier_every_change_is_a_hint() {
    let (dir, watch) = watched();
    watch.cover(RootId(0), &RelPath::root());
    for round in 0..50 {
        let name = format!("f{round}");
        std::fs::write(dir.path().join(&name), b"x").unwrap();
        watch.barrier(LIMIT).unwrap();
        assert_eq!(names(&watch, ""), [(name, Hint::Replaced)]);
    }
    std::fs::write(dir.path().join("f1"), b"y").unwrap();
    watch.barrier(LIMIT).unwrap();
    assert_eq!(names(&watch, ""), [("f1".into(), Hint::Changed)]);
}

#[test]
fn a_root_that_is_only_read_is_watched_and_has_no_barrier() {
    let dir = tempfile::tempdir().unwrap();
    let watch = Watch::start(Backend::Inotify, vec![dir.path().canonicalize().unwrap().into()], Box::new(|| ())).unwrap();
    watch.cover(RootId(0), &RelPath::root());
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let deadline = Instant::now() + LIMIT;
    while watch.dirty().is_empty() {
        watch.catch_up();
        assert!(Instant::now() < deadline, "no hint came");
    }
    assert_eq!(names(&watch, ""), [("f".into(), Hint::Replaced)]);
    assert!(matches!(watch.barrier(LIMIT), Err(WatchError::Root { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_replaced_directory_is_covered_anew() {
    let (dir, watch) = watched();
    let d = RelPath::new(*b"d").unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    watch.cover(RootId(0), &RelPath::root());
    watch.cover(RootId(0), &d);
    assert_eq!(watch.coverage().watched, 2);
    std::fs::rename(dir.path().join("d"), dir.path().join("e")).unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    watch.barrier(LIMIT).unwrap();
    assert_eq!(names(&watch, ""), [("d".into(), Hint::Replaced), ("e".into(), Hint::Replaced)]);
    assert_eq!(watch.coverage().watched, 1);
    watch.cover(RootId(0), &d);
    std::fs::write(dir.path().join("d/x"), b"x").unwrap();
    watch.barrier(LIMIT).unwrap();
    assert_eq!(names(&watch, "d"), [("x".into(), Hint::Replaced)]);
}

#[test]
fn own_marks_are_no_hints() {
    let (_dir, watch) = watched();
    watch.cover(RootId(0), &RelPath::root());
    watch.barrier(LIMIT).unwrap();
    watch.barrier(LIMIT).unwrap();
    assert!(watch.dirty().is_empty());
}

/// Whoever waited on would keep the index from the role that the host has next.
#[test]
fn a_barrier_waits_for_no_helper_that_has_ended() {
    let Some((_dir, watch, link)) = marked_through() else { return };
    watch.barrier(LIMIT).unwrap();
    link.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(watch.barrier(LIMIT), Err(WatchError::Gone)));
    assert!(watch.is_stale());
}

#[test]
fn fanotify_tells_of_everything_below_a_root_and_of_nothing_else() {
    let Some((dir, watch)) = marked() else { return };
    let other = tempfile::tempdir_in(dir.path().parent().unwrap()).unwrap();
    std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
    std::fs::write(dir.path().join("d/e/f"), b"x").unwrap();
    std::fs::write(other.path().join("f"), b"x").unwrap();
    watch.barrier(LIMIT).unwrap();
    let hints = watch.dirty().take();
    let dirs: Vec<String> = hints.dirs.keys().map(|(_, path)| path.to_string()).collect();
    assert_eq!(dirs, [".", "d", "d/e"]);
    std::fs::rename(dir.path().join("d"), dir.path().join("moved")).unwrap();
    std::fs::write(dir.path().join("moved/e/f"), b"y").unwrap();
    watch.barrier(LIMIT).unwrap();
    let hints = watch.dirty().take();
    let dirs: Vec<String> = hints.dirs.keys().map(|(_, path)| path.to_string()).collect();
    assert_eq!(dirs, [".", "moved/e"]);
    assert_eq!(watch.coverage(), Coverage { watched: 1, unwatched: 0, overflows: 0 });
}

#[test]
fn by_fanotify_too_every_change_is_a_hint_after_the_barrier() {
    let Some((dir, watch)) = marked() else { return };
    for round in 0..50 {
        let name = format!("f{round}");
        std::fs::write(dir.path().join(&name), b"x").unwrap();
        watch.barrier(LIMIT).unwrap();
        assert_eq!(names(&watch, ""), [(name, Hint::Replaced)]);
    }
    watch.rebuild().unwrap();
    std::fs::write(dir.path().join("f1"), b"y").unwrap();
    watch.barrier(LIMIT).unwrap();
    assert_eq!(names(&watch, ""), [("f1".into(), Hint::Changed)]);
}

#[test]
fn who_changed_something_is_told() {
    let Some((dir, watch)) = marked() else { return };
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    watch.barrier(LIMIT).unwrap();
    let processes = watch.take_processes();
    let found = processes.get(&(RootId(0), RelPath::new(*b"f").unwrap())).expect("somebody did it");
    assert_eq!(found.pid, std::process::id());
    assert_eq!(found.program, std::env::current_exe().unwrap().to_str().unwrap());
    assert!(!found.command.is_empty());
    assert!(watch.take_processes().is_empty());
}
