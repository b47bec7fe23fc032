//! What a change of a large file costs: a megabyte written over in its midst, put before its front, and after its end.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::Settings;
use crate::home::{self, SEED};
use crate::pair::{Pair, RsyncDaemon, check_equal};
use crate::process::measure;
use crate::report::{Result, figure, median, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "large";

const FILE: &str = "shared/data/large";
const CHANGED_BYTES: u64 = 1_000_000;

/// Puts bytes into a file.
type Change = fn(&Path, &[u8]) -> Result<()>;

const CHANGES: [(&str, Change); 3] =
    [("a megabyte changed in the midst", write_over), ("a megabyte put in front", prepend), ("a megabyte appended", append)];

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings, has_rsync: bool) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let dir = settings.passing_dir(SECTION)?;
    let source = dir.path().join("home");
    fs::create_dir_all(source.join("shared/data"))?;
    let file = source.join(FILE);
    home::make_noise(&file, settings.large_bytes, SEED)?;
    let [ours, theirs] = ["coldspare", "rsync"].map(|name| dir.path().join(name));
    fs::create_dir(&ours)?;
    fs::create_dir(&theirs)?;
    let pair = Pair::make(&source, &ours)?;
    let receiver = pair.receive()?;
    measure(&mut pair.send_once(), &receiver)?;
    let peer = if has_rsync { Some(RsyncDaemon::start(&theirs)?) } else { None };
    if let Some(peer) = &peer {
        peer.push(&source)?;
    }
    println!("a file of {:.0} MB\n", settings.large_bytes as f64 / 1e6);
    println!("| change | coldspare sent, MB | rsync sent, MB | coldspare, s | rsync, s | ratio |\n|---|---|---|---|---|---|");
    let mut rows = Vec::new();
    for (no, (what, change)) in CHANGES.iter().enumerate() {
        let (mut sent, mut seconds, mut peer_sent, mut peer_seconds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for run_no in 0..settings.runs {
            let noise = dir.path().join("noise");
            home::make_noise(&noise, CHANGED_BYTES, SEED + 100 * (no as u64 + 1) + run_no as u64)?;
            change(&file, &fs::read(&noise)?)?;
            run(Command::new("sync").arg("-f").arg(dir.path()))?;
            let cost = measure(&mut pair.send_once(), &receiver)?;
            let told: Value = serde_json::from_str(&cost.stdout)?;
            sent.push(told["bytes_sent"].as_f64().ok_or("no bytes_sent in the output of send")?);
            seconds.push(cost.seconds);
            check_equal(&source, &pair.destination)?;
            if let Some(peer) = &peer {
                let (sent, seconds) = peer.push(&source)?;
                peer_sent.push(sent);
                peer_seconds.push(seconds);
            }
        }
        let has_peer = !peer_sent.is_empty();
        let ratio = has_peer.then(|| median(&seconds) / median(&peer_seconds));
        let shown = |values: &[f64], by: f64| if values.is_empty() { "-".into() } else { figure(median(values) / by) };
        println!(
            "| {what} | {} | {} | {} | {} | {} |",
            shown(&sent, 1e6),
            shown(&peer_sent, 1e6),
            shown(&seconds, 1.0),
            shown(&peer_seconds, 1.0),
            ratio.map_or("-".into(), figure),
        );
        let peer = json!({"sent": peer_sent, "seconds": peer_seconds});
        rows.push(json!({"change": what, "sent": sent, "seconds": seconds, "rsync": peer, "ratio": ratio}));
    }
    println!();
    Ok(Some(json!({"home": "large", "bytes": settings.large_bytes, "rows": rows})))
}

fn write_over(file: &Path, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).open(file)?;
    Ok(file.write_all_at(bytes, file.metadata()?.len() / 2)?)
}

fn prepend(file: &Path, bytes: &[u8]) -> Result<()> {
    let new = file.with_extension("new");
    let mut to = File::create(&new)?;
    to.write_all(bytes)?;
    std::io::copy(&mut File::open(file)?, &mut to)?;
    Ok(fs::rename(new, file)?)
}

fn append(file: &Path, bytes: &[u8]) -> Result<()> {
    Ok(File::options().append(true).open(file)?.write_all(bytes)?)
}
