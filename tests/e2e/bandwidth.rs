//! A limit of the sending rate holds, is told, and goes with the time.

use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use crate::pair::{Pair, run, until};
use crate::seed::Seed;

/// How long a limit holds that ends: long enough for both daemons to start, and to send something.
const LIMITED_SECONDS: i32 = 20;

/// Both daemons, with these sections in the active's configuration.
fn limited(sections: &str) -> Pair {
    let mut pair = Pair::new();
    let config = pair.active.config();
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(!text.contains("[link"), "{text}");
    std::fs::write(&config, format!("{text}\n{sections}")).unwrap();
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    pair
}

fn limit(pair: &Pair) -> Value {
    pair.active.status()["link"]["bytes_per_second_max"].clone()
}

/// The local time of the day, some seconds from now.
fn clock(seconds: i32) -> String {
    run(Command::new("date").args(["-d", &format!("{seconds} seconds"), "+%H:%M:%S"])).expect_code(0).out.trim().into()
}

#[test]
fn no_more_is_sent_than_the_limit_allows() {
    let pair = limited("[link]\nbandwidth = \"2 MB/s\"\n");
    assert_eq!(limit(&pair), 2_000_000);
    assert!(pair.active.run(&["status"]).expect_code(0).out.contains("2.00 MB/s"));
    // At once: one that grows while it is read is sent more than once.
    let outside = pair.dir.path().join("noise");
    std::fs::write(&outside, Seed::new(1).noise(6_000_000)).unwrap();
    // The file is on its way before the checkpoint is asked for.
    let start = Instant::now();
    std::fs::rename(&outside, pair.active.home.join("noise")).unwrap();
    pair.checkpoint();
    let seconds = start.elapsed().as_secs_f64();
    println!("6 MB at 2 MB/s took {seconds:.2} s");
    assert!(seconds > 2.0, "6 MB at 2 MB/s took {seconds} s");
    pair.assert_equal();
}

#[test]
fn a_limit_ends_with_its_time() {
    // At the limit it would take longer than a checkpoint may.
    let noise = Seed::new(2).noise(40_000_000);
    let to = clock(LIMITED_SECONDS);
    let sections = format!("[[link.schedule]]\nfrom = \"{}\"\nto = \"{to}\"\nbandwidth = \"400 kB/s\"\n", clock(-60));
    let pair = limited(&sections);
    assert_eq!(limit(&pair), 400_000);
    pair.active.write("shared/noise", noise);
    let mut sent = 0;
    until("the limit is over", || {
        let status = pair.active.status();
        let is_limited = status["link"]["bytes_per_second_max"] == 400_000;
        if is_limited {
            sent = status["bytes_sent"].as_u64().unwrap();
        }
        !is_limited
    });
    let most = (LIMITED_SECONDS as u64 + 1) * 400_000;
    assert!((100_000..most).contains(&sent), "{sent} bytes were sent while the limit held");
    let seconds = pair.checkpoint()["seconds"].as_f64().unwrap();
    println!("{sent} bytes were sent by then, and the rest in {seconds:.2} s");
    assert!(pair.active.log().contains("another limit of the sending rate holds"));
    pair.assert_equal();
}
