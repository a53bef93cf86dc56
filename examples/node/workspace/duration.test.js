import assert from "node:assert/strict";
import { test } from "node:test";
import { duration } from "./duration.js";

test("parts that are zero are left out", () => {
  assert.equal(duration(3603), "1h 3s");
});

test("nothing at all is zero seconds", () => {
  assert.equal(duration(0), "0s");
});
