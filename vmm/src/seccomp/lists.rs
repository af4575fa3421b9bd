//! What the lists in resources/seccomp come to for one build: those of the threads, and what they need besides.

use serde_json::{Map, Value};

/// The document of all lists. `read` gives a file by its name without ".json"; `c_library` names the rules that the C
/// library needs, and of the target is `target_env`; in debug builds there are some more.
pub fn assemble<E>(
    threads: &[&str],
    c_library: &str,
    is_debug: bool,
    read: impl Fn(&str) -> Result<Value, E>,
) -> Result<Value, E> {
    let of_library = read(c_library)?;
    let of_debug = match is_debug {
        true => read("debug")?,
        false => Value::Null,
    };
    let mut document = Map::new();
    for thread in threads {
        let mut list = read(thread)?[*thread].take();
        if let Some(rules) = list["filter"].as_array_mut() {
            for more in [&of_library[*thread], &of_debug] {
                rules.extend(more.as_array().into_iter().flatten().cloned());
            }
        }
        document.insert((*thread).to_owned(), list);
    }
    Ok(Value::Object(document))
}
