//! SIGKILL at any time costs nothing but time.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::pair::{Pair, until};

#[test]
fn trees_are_equal_after_twenty_kills_under_load_and_nothing_unchanged_is_read_again() {
    let mut pair = Pair::following();
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
        std::thread::sleep(std::time::Duration::from_millis(2)); // the load, not a wait
    }
    round
}
