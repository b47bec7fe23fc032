//! What a home may hold arrives as it is; what must not arrive, doesn't.

use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::pair::{Host, Pair, let_times_age, succeeds};

/// What stays on the active: excluded by the profile, or special.
const LEFT_OUT: [&str; 6] = ["caches", "log", "tmp", "shared/fifo", "shared/socket", "shared/data/db.mv.db"];

fn fill(host: &Host) {
    host.write("shared/data/regular", "content\n".repeat(10_000));
    host.write("shared/data/empty", "");
    host.write("shared/config/hook.sh", "#!/bin/sh\n");
    mode(&host.home.join("shared/config/hook.sh"), 0o755);
    fs::create_dir_all(host.home.join("shared/empty/inside")).unwrap();
    let mut sparse = File::create(host.home.join("shared/sparse")).unwrap();
    sparse.seek(SeekFrom::Start(8 << 20)).unwrap();
    sparse.write_all(b"in the middle").unwrap();
    sparse.set_len(16 << 20).unwrap();
    let large: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    host.write("shared/large", large);
    fs::hard_link(host.home.join("shared/large"), host.home.join("shared/data/linked")).unwrap();
    fs::hard_link(host.home.join("shared/large"), host.home.join("linked too")).unwrap();
    symlink("../does/not/exist", host.home.join("shared/dangling")).unwrap();
    symlink("/etc/passwd", host.home.join("shared/absolute")).unwrap();
    symlink("data", host.home.join("shared/to-a-folder")).unwrap();
    for name in [&b"new\nline"[..], b" space ", b"not \xff utf-8", b"back\\slash", b"-dash", b"quote\"'", &[b'n'; 255]] {
        let name = std::ffi::OsString::from_vec(name.to_vec());
        fs::write(host.home.join("shared").join(&name), name.as_encoded_bytes()).unwrap();
    }
    mode(&host.home.join("shared/empty"), 0o2770);
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    File::options().write(true).open(host.home.join("shared/data/regular")).unwrap().set_modified(time).unwrap();
    let attributed = host.write("shared/attributed", "attributes");
    rustix::fs::setxattr(&attributed, "user.note", b"\0bytes\xff", rustix::fs::XattrFlags::empty()).unwrap();
    if !succeeds("setfacl", &["-m", "u:12345:rw", &attributed.to_string_lossy()]) {
        eprintln!("skipped: setfacl is missing, or the filesystem has no ACLs");
    }
    std::os::unix::fs::chown(host.home.join("shared/data/empty"), Some(12_345), Some(54_321)).unwrap_or(());
    fill_edges(host);
    fs::create_dir_all(host.store.join("repositories/ab/cd")).unwrap();
    fs::write(host.store.join("repositories/ab/cd/file"), "in the second root").unwrap();

    host.write("caches/x", "cache");
    host.write("log/bitbucket.log", "log");
    host.write("tmp/x", "tmp");
    host.write("shared/data/db.mv.db", "database");
    assert!(succeeds("mkfifo", &[&host.home.join("shared/fifo").to_string_lossy()]));
    drop(UnixListener::bind(host.home.join("shared/socket")).unwrap());
}

/// Attributes of what isn't a plain file, and values at the edge of what there is.
fn fill_edges(host: &Host) {
    let shared = host.home.join("shared");
    symlink("of another owner", shared.join("owned-link")).unwrap();
    std::os::unix::fs::lchown(shared.join("owned-link"), Some(12_345), Some(54_321)).unwrap_or(());
    symlink("x".repeat(4000), shared.join("long-target")).unwrap();

    host.write("shared/closed", "nobody may read it");
    mode(&shared.join("closed"), 0o000);
    let old = SystemTime::UNIX_EPOCH - Duration::new(86_400, 1);
    let late = SystemTime::UNIX_EPOCH + Duration::new(5_000_000_000, 999_999_999);
    for (name, time) in [("before-1970", old), ("after-2038", late)] {
        let path = host.write(&format!("shared/{name}"), name);
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }
    for name in [&[b'd'; 255][..], &[0xfe; 255], b"\x01\x1b[31m\x7f", "\u{e9}t\u{e9}".as_bytes()] {
        let name = std::ffi::OsString::from_vec(name.to_vec());
        fs::create_dir(shared.join(&name)).unwrap();
        fs::write(shared.join(&name).join(&name), name.as_encoded_bytes()).unwrap();
    }

    let folder = shared.join("attributed-folder");
    host.write("shared/attributed-folder/inside", "");
    for (key, value) in [("user.empty", &b""[..]), ("user.long", &[7; 2000])] {
        rustix::fs::setxattr(&folder, key, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    let _ = succeeds("setfacl", &["-d", "-m", "u:12345:rx", &folder.to_string_lossy()]);
    std::os::unix::fs::chown(&folder, Some(12_345), Some(54_321)).unwrap_or(());
    mode(&folder, 0o1750);
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_111_111_111, 111_111_111);
    File::open(&folder).unwrap().set_modified(time).unwrap();
}

#[test]
fn everything_a_home_holds_arrives_and_one_flipped_byte_is_named() {
    let mut pair = Pair::new();
    fill(&pair.active);
    let_times_age();
    pair.standby.configure("[hands_off]\nheal = false\n");
    pair.standby.start();
    let done = pair.send_once();
    assert!(done["files"].as_u64().unwrap() > 10, "{done}");

    let unexpected: Vec<String> = pair.differences().into_iter().filter(|line| !is_left_out(line)).collect();
    assert_eq!(unexpected, Vec::<String>::new());
    for path in LEFT_OUT {
        assert!(!pair.standby.home.join(path).exists(), "{path} is on the standby");
    }
    let sparse = fs::metadata(pair.standby.home.join("shared/sparse")).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) * 512 < 1 << 20, "the holes were filled");
    pair.standby.run(&["verify", "--deep"]).expect_code(0);

    let again = pair.send_once();
    assert_eq!((&again["files"], &again["bytes_read"]), (&0.into(), &0.into()), "unchanged content was read again: {again}");

    flip_byte(&pair.standby.home.join("shared/large"), 1_500_000);
    let found = pair.standby.run(&["verify", "--deep", "--json"]).expect_code(1).json();
    let mut named: Vec<&str> = found["problems"].as_array().unwrap().iter().filter_map(|p| p["path"].as_str()).collect();
    named.sort_unstable();
    // One file under three names.
    assert!(!named.is_empty() && named.iter().all(|n| ["linked too", "shared/data/linked", "shared/large"].contains(n)), "{found}");
    flip_byte(&pair.standby.home.join("shared/large"), 1_500_000);
    flip_byte(&pair.standby.home.join("shared/data/regular"), 5);
    let found = pair.standby.run(&["verify", "--deep", "--json"]).expect_code(1).json();
    let named: Vec<&str> = found["problems"].as_array().unwrap().iter().filter_map(|p| p["path"].as_str()).collect();
    assert_eq!(named, ["shared/data/regular"], "{found}");
}

fn is_left_out(line: &str) -> bool {
    let Some((_, path)) = line.split_once(' ') else { return false };
    LEFT_OUT.iter().any(|left| Path::new(path.trim_end_matches('/')).starts_with(left))
}

/// Flips a bit and keeps the time of modification.
pub(crate) fn flip_byte(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.set_modified(modified).unwrap();
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}
