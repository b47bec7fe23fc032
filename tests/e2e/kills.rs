//! SIGKILL at any time costs nothing but time.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::git::{self, commit, git, git_ok, push};
use crate::pair::{Pair, until};
use crate::recorder::Recorder;
use crate::seed::{Seed, number_from_env};

/// Unless `COLDSPARE_KILLS` says more.
const KILLS: u64 = 8;

#[test]
fn trees_are_equal_after_twenty_kills_under_load_and_nothing_unchanged_is_read_again() {
    let mut pair = Pair::following_unasked();
    for n in 0..300 {
        pair.active.write(&format!("shared/data/still/{}/{n}", n % 7), format!("unchanged {n}\n").repeat(50));
    }
    pair.checkpoint();
    let (home, stop) = (pair.active.home.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(&home, &stop));
        // A failed expectation must not leave the writer running.
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..10 {
                pair.standby.kill();
                pair.standby.start();
                until("something was applied", || pair.standby.status()["connected"] == true);
                pair.active.kill();
                pair.active.start();
                until("they are connected", || pair.active.status()["connected"] == true);
            }
        }));
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 100, "the load was no load");
        killed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    pair.checkpoint();
    pair.assert_equal();
    pair.standby.run(&["verify", "--deep"]).expect_code(0);

    pair.active.kill();
    // What was written within the clock's grain of its capture is looked at once more.
    until("a restarted sender reads nothing", || pair.send_once()["bytes_read"] == 0);
    let once = pair.send_once();
    assert_eq!((&once["files"], &once["bytes_read"]), (&0.into(), &0.into()), "{once}");
}

#[test]
fn a_repository_is_clean_before_and_after_the_restart_of_a_killed_receiver() {
    const REPOSITORY: &str = "shared/data/repositories/1";
    /// Would be sent again by a seed.
    const STILL_BYTES: usize = 16 << 20;
    let mut pair = Pair::following();
    let mut seed = Seed::from_env();
    let recorder = Recorder::new(pair.dir.path());
    let (here, there) = (pair.active.home.join(REPOSITORY), pair.standby.home.join(REPOSITORY));
    let clone = pair.dir.path().join("clone");
    git::init_bare(&here);
    recorder.install(&here, REPOSITORY);
    git::clone(&here, &clone);
    commit(&clone, "file", "first");
    push(&clone, &["HEAD:main"]);
    pair.active.write("shared/data/still", Seed::new(1).noise(STILL_BYTES));
    pair.checkpoint();
    let (floor, sent) = (recorder.now(), bytes_sent(&pair));

    let (stop, mut seen) = (AtomicBool::new(false), Vec::new());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                commit(&clone, &format!("file{}", round % 5), &format!("round {round}"));
                push(&clone, &["HEAD:main", &format!("+HEAD:refs/heads/b{}", round % 3)]);
                match round % 5 {
                    2 => drop(git_ok(&here, &["repack", "-q", "-adb"])),
                    // The hook would be told of a removal for each loose file, though no value changes.
                    4 => drop(git_ok(&here, &["-c", "core.hooksPath=/dev/null", "pack-refs", "--all"])),
                    _ => {}
                }
            }
            round
        });
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for kill in 0..number_from_env("COLDSPARE_KILLS").unwrap_or(KILLS) {
                until("they are connected", || pair.standby.status()["connected"] == true);
                std::thread::sleep(Duration::from_millis(seed.below(300))); // any moment is to be hit
                pair.standby.kill();
                let mut look = |state: &str| {
                    let ran = git(&there, &["fsck", "--full"]);
                    assert!(ran.code == 0, "kill {kill}, {state} the restart: {ran:#?}");
                    seen.push((git::references(&there), recorder.now()));
                };
                look("before");
                // It finishes what it had begun, and is stopped again before it looks at anything new.
                pair.standby.start();
                let frozen = pair.standby.freeze();
                look("after");
                drop(frozen);
            }
        }));
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 3, "the load was no load");
        killed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let history = recorder.history();
    for (references, now) in seen {
        history.check_each(REPOSITORY, &references, floor, now).unwrap();
    }
    pair.checkpoint();
    assert_eq!(git::references(&there), git::references(&here));
    git::assert_clean(&there);
    pair.assert_equal();
    let again = bytes_sent(&pair) - sent;
    assert!(again < STILL_BYTES as u64, "{again} bytes were sent: a seed");
}

fn bytes_sent(pair: &Pair) -> u64 {
    pair.active.status()["bytes_sent"].as_u64().unwrap()
}

/// Writes, appends, renames and deletes; the number of rounds.
fn write_until(home: &Path, stop: &AtomicBool) -> u32 {
    let dir = home.join("shared/data/load");
    fs::create_dir_all(&dir).unwrap();
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        let at = |n: u32| dir.join(format!("{}/{}", n % 5, n % 40));
        fs::create_dir_all(at(round).parent().unwrap()).unwrap();
        fs::write(at(round), format!("round {round}\n").repeat(round as usize % 2000)).unwrap();
        if round % 3 == 0 {
            let _ = fs::rename(at(round), dir.join(format!("renamed-{}", round % 11)));
        }
        if round % 17 == 0 {
            let _ = fs::remove_dir_all(dir.join(format!("{}", (round + 2) % 5)));
        }
        round += 1;
        std::thread::sleep(Duration::from_millis(2)); // the load, not a wait
    }
    round
}
