//! Changes as fast as they can be made, in ways that a watch may lose track of: both ends become equal, and the proof
//! finds that nothing was missed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::pair::{Pair, until};
use crate::seed::{Seed, number_from_env};
use crate::watches::{Mounted, following_by};

/// Steps of each writer, unless `COLDSPARE_RACE_STEPS` says more.
const STEPS: u64 = 3_000;
/// Names in one folder: few, so that they meet.
const NAMES: u64 = 6;
const DEPTH_MAX: u64 = 4;
/// Steps of each writer until the watch has caught up: so few that its queue holds all their events, however slow it is.
const STEPS_AT_ONCE: u64 = 300;

#[test]
fn whatever_races_fanotify_follows() {
    check("fanotify");
}

#[test]
fn whatever_races_inotify_follows() {
    check("inotify");
}

fn check(backend: &str) {
    let bound_from = tempfile::tempdir().unwrap();
    let bound = |pair: &Pair| {
        let at = pair.active.home.join("shared/bound");
        let mounted = Mounted::at(&at, &["--bind", bound_from.path().to_str().unwrap()]);
        if mounted.is_none() {
            println!("nothing can be mounted here: without a bind mount");
        }
        mounted
    };
    let Some((pair, _bound)) = following_by(backend, "full_scan_seconds = 3\n", bound) else { return };
    let places = ["shared/data", "shared/bound"].map(|dir| pair.active.home.join(dir));
    let places = [places[0].clone(), places[1].clone(), pair.active.store.clone()];
    places.iter().for_each(|dir| fs::create_dir_all(dir).unwrap());
    let mut seed = Seed::from_env();
    let steps = number_from_env("COLDSPARE_RACE_STEPS").unwrap_or(STEPS);
    let mut seeds = [0; 2].map(|_| Seed::new(seed.next()));
    for from in (0..steps).step_by(STEPS_AT_ONCE as usize) {
        std::thread::scope(|scope| {
            for seed in &mut seeds {
                let places = &places;
                scope.spawn(move || (from..steps.min(from + STEPS_AT_ONCE)).for_each(|no| step(seed, places, no)));
            }
        });
        pair.checkpoint();
    }
    pair.assert_equal();
    let watch = |name: &str| pair.active.status()["watch"][name].as_u64().unwrap();
    let proofs = watch("proofs");
    until("all was gone over twice", || watch("proofs") >= proofs + 2);
    assert_eq!(watch("missed"), 0, "{}", pair.active.log());
    assert_eq!(watch("overflows"), 0);
    assert!(!pair.standby.log().contains("was not applied"), "{}", pair.standby.log());
    pair.assert_equal();
}

/// One change; another writer may have been faster, which is no failure.
fn step(seed: &mut Seed, places: &[PathBuf], no: u64) {
    let done = match seed.below(12) {
        // A chain of new folders, and a file in the last at once.
        0..=2 => {
            let dir = some_path(seed, places);
            fs::create_dir_all(&dir).and_then(|()| fs::write(dir.join(format!("f{}", seed.below(NAMES))), content(seed, no)))
        }
        3 | 4 => fs::write(some_path(seed, places), content(seed, no)),
        // Written, and its folder renamed in the same breath.
        5 => {
            let dir = some_path(seed, places);
            let other = some_path(seed, places);
            fs::write(dir.join("last"), content(seed, no)).and_then(|()| fs::rename(&dir, other))
        }
        // Also from one root to another.
        6 | 7 => fs::rename(some_path(seed, places), some_path(seed, places)),
        8 => fs::remove_file(some_path(seed, places)),
        // Gone, and there again under the same name.
        9 => {
            let dir = some_path(seed, places);
            fs::remove_dir_all(&dir).and_then(|()| fs::create_dir(&dir)).and_then(|()| fs::write(dir.join("new"), content(seed, no)))
        }
        10 => {
            let path = some_path(seed, places);
            fs::remove_file(&path).and_then(|()| fs::create_dir(&path)).and_then(|()| fs::write(path.join("was a file"), b"x"))
        }
        _ => {
            let path = some_path(seed, places);
            fs::remove_dir_all(&path).and_then(|()| fs::write(&path, b"was a folder"))
        }
    };
    const MET: [ErrorKind; 9] = [
        ErrorKind::NotFound,
        ErrorKind::AlreadyExists,
        ErrorKind::IsADirectory,
        ErrorKind::NotADirectory,
        ErrorKind::DirectoryNotEmpty,
        ErrorKind::CrossesDevices,
        ErrorKind::InvalidInput,
        ErrorKind::ResourceBusy,
        ErrorKind::PermissionDenied,
    ];
    match done {
        Err(e) if !MET.contains(&e.kind()) => panic!("a writer met {e}"),
        _ => {}
    }
}

fn some_path(seed: &mut Seed, places: &[PathBuf]) -> PathBuf {
    let place: &Path = &places[seed.below(places.len() as u64) as usize];
    (0..=seed.below(DEPTH_MAX)).fold(place.to_path_buf(), |path, _| path.join(format!("n{}", seed.below(NAMES))))
}

fn content(seed: &mut Seed, no: u64) -> String {
    format!("{no} {}\n", seed.next()).repeat(1 + seed.below(60) as usize)
}
