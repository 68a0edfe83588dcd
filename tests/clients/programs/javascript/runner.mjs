// Runs clients' programs in this environment, one after the other: `runner.mjs CLIENT:CAPABILITY …`.
// Prints a line of JSON for each, with what it found or how it failed; what the libraries print goes elsewhere.
import { REFUSALS } from "./common.mjs";

console.log = console.info = console.warn = console.error;

async function run(client, capability) {
  const program = await import(`./with_${client}.mjs`);
  if (!capability.startsWith("refused_")) return await program[capability]();
  let answer;
  try {
    answer = await program.ask(REFUSALS[capability.slice("refused_".length)]);
  } catch (error) {
    return program.describe(error);
  }
  throw new Error(`it was answered: ${JSON.stringify(answer)}`);
}

for (const name of process.argv.slice(2)) {
  const [client, capability] = name.split(":");
  const started = performance.now();
  const line = { client, capability };
  try {
    line.found = await run(client, capability);
  } catch (error) {
    line.failed = String(error?.stack ?? error).slice(-4000);
  }
  line.took_s = Math.round(performance.now() - started) / 1000;
  process.stdout.write(`${JSON.stringify(line)}\n`);
}
