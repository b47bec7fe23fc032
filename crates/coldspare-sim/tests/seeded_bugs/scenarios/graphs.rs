//! Commit graphs that git merges and drops while they are captured.

use coldspare_scan::capture::Work;
use coldspare_sim::model::ModelDisk;

use super::{Both, Contents, SETTLED_MS, TIP_CONTENT, blob, holds, with_repository};

const FOLDER: &str = "repo/objects/info/commit-graphs";
const CHAIN: &str = "repo/objects/info/commit-graphs/commit-graph-chain";

/// git drops all graphs, or merges the layers, at any call: a chain never names a layer that isn't there.
pub(crate) fn a_chain_comes_with_its_layers_or_not_at_all() -> Result<(), String> {
    let drop_all: fn(&ModelDisk) = |disk| {
        let _ = disk.remove(Both::at(CHAIN));
        let _ = disk.remove(Both::at(FOLDER));
    };
    let merge: fn(&ModelDisk) = |disk| {
        disk.write(Both::at(&layer("b")), &graph()).unwrap();
        disk.write(Both::at(CHAIN), b"b\n").unwrap();
        let _ = disk.remove(Both::at(&layer("a")));
        disk.advance_ms(1);
    };
    for work in [Work::Everything, Work::Hinted] {
        for (what, is_known) in [(drop_all, false), (drop_all, true), (merge, false), (merge, true)] {
            for at in 0.. {
                let mut both = with_repository();
                both.write_blob("repo", TIP_CONTENT);
                both.write_blob("repo", "thrown away");
                both.active.make_dirs(Both::at(FOLDER));
                both.watch();
                both.follow()?;
                both.write(&layer("a"), &graph());
                both.write(CHAIN, b"a\n");
                if is_known {
                    both.follow()?;
                    let (name, _) = blob("thrown away");
                    both.active.remove(Both::at(&format!("repo/objects/{}/{}", &name[..2], &name[2..]))).unwrap();
                }
                both.active.advance_ms(SETTLED_MS);
                let is_within = both.follow_while(work, at, what)?;
                check(&both.there(), at)?;
                both.active.advance_ms(SETTLED_MS);
                both.follow()?;
                check(&both.there(), at)?;
                holds(both.there() == both.here(), &format!("G2: changed at call {at}: the next changesets don't bring it"))?;
                if !is_within {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn layer(name: &str) -> String {
    format!("{FOLDER}/graph-{name}.graph")
}

fn check(there: &Contents, at: u64) -> Result<(), String> {
    let chain = there.get(CHAIN).map(|content| String::from_utf8_lossy(content).into_owned()).unwrap_or_default();
    chain.lines().try_for_each(|name| {
        holds(there.contains_key(&layer(name)), &format!("G2: changed at call {at}: the chain names the layer {name}, which isn't there"))
    })
}

/// A commit graph that names one commit.
fn graph() -> Vec<u8> {
    let id = blob(TIP_CONTENT).0;
    let id: Vec<u8> = (0..id.len()).step_by(2).map(|n| u8::from_str_radix(&id[n..n + 2], 16).unwrap()).collect();
    let mut out = b"CGPH\x01\x01\x01\x00".to_vec();
    let at = out.len() as u64 + 2 * 12;
    for (chunk, offset) in [(b"OIDL", at), (&[0; 4], at + 20)] {
        out.extend_from_slice(chunk);
        out.extend_from_slice(&offset.to_be_bytes());
    }
    out.extend_from_slice(&id);
    out.extend_from_slice(&[0; 20]);
    out
}
