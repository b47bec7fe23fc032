//! What the standby has under another name is not sent again.

use std::fs;
use std::path::Path;

use crate::pair::Pair;
use crate::seed::Seed;

/// More than what is put off when it is new.
const LARGE: usize = 9 << 20;
/// More than what travels whole inside a batch.
const MEDIUM: usize = 200_000;
/// What a changeset may take that brings no content.
const LITTLE: u64 = 30_000;

fn following(files: &[(&str, usize)]) -> Pair {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.active.start();
    for (n, (path, bytes)) in files.iter().enumerate() {
        pair.active.write(path, Seed::new(n as u64).noise(*bytes));
    }
    pair.checkpoint();
    pair
}

fn costs_little(pair: &Pair, change: impl Fn(&Path)) {
    let sent = pair.sent_by(|| {
        let _frozen = pair.active.freeze();
        change(&pair.active.home);
    });
    assert!(sent < LITTLE, "{sent} bytes were sent");
    pair.assert_equal();
}

#[test]
fn a_file_that_is_copied_or_moved_is_not_sent_again() {
    let pair = following(&[("shared/large", LARGE), ("shared/medium", MEDIUM)]);
    for name in ["large", "medium"] {
        costs_little(&pair, |home| {
            fs::create_dir_all(home.join("shared/folder")).unwrap();
            fs::copy(home.join("shared").join(name), home.join("shared/folder").join(name)).unwrap();
        });
        // Its source goes with the same changeset.
        costs_little(&pair, |home| fs::rename(home.join("shared").join(name), home.join("shared/folder/moved")).unwrap());
        costs_little(&pair, |home| fs::rename(home.join("shared/folder/moved"), home.join("shared").join(name)).unwrap());
        // A copy of a copy, of which the first is gone.
        costs_little(&pair, |home| fs::remove_file(home.join("shared").join(name)).unwrap());
        costs_little(&pair, |home| fs::copy(home.join("shared/folder").join(name), home.join("shared").join(name)).map(drop).unwrap());
    }
    // A copy is a file of its own, and changes as one: what it consists of is known.
    let copy = pair.active.home.join("shared/large");
    let sent = pair.sent_by(|| {
        let _frozen = pair.active.freeze();
        let mut content = fs::read(&copy).unwrap();
        content.splice(5_000_000..5_000_000, *b"inserted");
        fs::write(&copy, content).unwrap();
    });
    assert!(sent < 600_000, "{sent} bytes were sent");
    pair.assert_equal();
}

#[test]
fn a_copy_that_is_seen_while_it_is_made_arrives_and_is_confirmed() {
    let pair = following(&[("shared/large", LARGE)]);
    for n in 0..8 {
        fs::copy(pair.active.home.join("shared/large"), pair.active.home.join(format!("shared/copy{n}"))).unwrap();
        pair.checkpoint();
    }
    pair.assert_equal();
}

#[test]
fn another_file_of_the_same_size_is_sent() {
    let pair = following(&[("shared/large", LARGE)]);
    let sent = pair.sent_by(|| drop(pair.active.write("shared/other", Seed::new(77).noise(LARGE))));
    assert!(sent > LARGE as u64, "{sent} bytes were sent");
    pair.assert_equal();
}

#[test]
fn a_copy_of_what_is_damaged_on_the_standby_is_sent() {
    let pair = following(&[("shared/large", LARGE)]);
    let there = pair.standby.home.join("shared/large");
    let modified = fs::metadata(&there).unwrap().modified().unwrap();
    {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(&there).unwrap();
        file.write_all_at(b"damaged", 1_000_000).unwrap();
        file.set_modified(modified).unwrap();
    }
    let good = fs::read(pair.active.home.join("shared/large")).unwrap();
    fs::copy(pair.active.home.join("shared/large"), pair.active.home.join("shared/copy")).unwrap();
    pair.checkpoint();
    assert!(fs::read(pair.standby.home.join("shared/copy")).unwrap() == good, "the damage was copied");
}
