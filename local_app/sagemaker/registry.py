"""The model registry: model package groups, and model packages with their versions."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from local_app.common import Json
from local_app.sagemaker.api import ServiceError, fitting, not_found, page
from local_app.sagemaker.store import Store
from pipeline.notify.package_events import package_event

MOST_PROPERTIES = 50  # CustomerMetadataProperties of one package
MOST_SPECIFICATIONS = 15  # AdditionalInferenceSpecifications of one package


def path_of(name_or_arn: str) -> str:
    """Return the last part of a package's ARN, `<group>/<version>` or `<name>`; a name stays as it is."""
    return re.sub(r"^arn:.*:model-package/", "", name_or_arn)


class ModelRegistry:
    """Model package groups and packages of one account and region. A package is ready as soon as it is created.

    Each change of a package writes its event in the same transaction. AWS documents the event of a deletion only by the
    status Deleting.
    """

    def __init__(self, store: Store, arn_prefix: str) -> None:
        self._store, self._arn_prefix = store, arn_prefix
        _, _, _, _, account = arn_prefix.split(":")
        self._creator = {"UserProfileName": "local", "IamIdentity": {"Arn": f"arn:aws:iam::{account}:root"}}

    # ------------------------------------------------------------------------------------------------------ groups

    def create_model_package_group(self, request: Json) -> Json:
        """Create a group; its name must be new."""
        name = request["ModelPackageGroupName"]
        arn = f"{self._arn_prefix}:model-package-group/{name}"
        with self._store.transaction():
            if self._store.get("group", name):
                # The service answers with a ValidationException in these words, not with ResourceInUse.
                raise ServiceError("ValidationException", f"Model Package Group already exists: {arn}")
            group = fitting("DescribeModelPackageGroupOutput", request) | {
                "ModelPackageGroupArn": arn,
                "CreationTime": time.time(),
                "CreatedBy": self._creator,
                "ModelPackageGroupStatus": "Completed",
            }
            self._store.put("group", name, {"group": group, "versions": 0})
            self._store.put("tags", arn, {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])})
        return {"ModelPackageGroupArn": arn}

    def describe_model_package_group(self, request: Json) -> Json:
        """Return a group by name or ARN."""
        group: Json = self._group(request["ModelPackageGroupName"])["group"]
        return group

    def list_model_package_groups(self, request: Json) -> Json:
        """Return summaries, filtered and paged."""
        result = page([item["group"] for item in self._store.all("group")], request, "ModelPackageGroupName")
        result["ModelPackageGroupSummaryList"] = [
            fitting("ModelPackageGroupSummary", group) for group in result.pop("items")
        ]
        return result

    def delete_model_package_group(self, request: Json) -> Json:
        """Delete an empty group."""
        with self._store.transaction():
            group = self._group(request["ModelPackageGroupName"])["group"]
            name = group["ModelPackageGroupName"]
            if any(package.get("ModelPackageGroupName") == name for package in self._packages()):
                raise ServiceError("ConflictException", f"Model Package Group {name} still contains Model Packages.")
            self._store.delete("group", name)
            self._store.delete("tags", group["ModelPackageGroupArn"])
        return {}

    # ---------------------------------------------------------------------------------------------------- packages

    def create_model_package(self, request: Json) -> Json:
        """Create the group's next version, or a package with a name of its own.

        A repeated ClientToken returns the same package; with another request it is a conflict.
        """
        if ("ModelPackageName" in request) == ("ModelPackageGroupName" in request):
            raise ServiceError("ValidationException", "Specify either ModelPackageName or ModelPackageGroupName.")
        if "ModelPackageGroupName" in request and request.get("Tags"):
            raise ServiceError("ValidationException", "A versioned model package has its group's tags: it takes no Tags.")
        token = request.get("ClientToken")
        with self._store.transaction():
            if token and (earlier := self._store.get("token", token)):
                if earlier["request"] != request:
                    raise ServiceError("ConflictException", f"ClientToken {token} was used with another request.")
                return {"ModelPackageArn": earlier["arn"]}
            package = fitting("DescribeModelPackageOutput", request) | {
                "CreationTime": time.time(),
                "CreatedBy": self._creator,
                "ModelPackageStatus": "Completed",
                "ModelPackageStatusDetails": {"ValidationStatuses": [], "ImageScanStatuses": []},
            }
            if "ModelPackageGroupName" in request:
                record = self._group(request["ModelPackageGroupName"])
                name = record["group"]["ModelPackageGroupName"]
                record["versions"] += 1  # the number of a deleted version is not used again
                self._store.put("group", name, record)
                path = f"{name}/{record['versions']}"
                package |= {
                    "ModelPackageName": name,
                    "ModelPackageGroupName": name,
                    "ModelPackageVersion": record["versions"],
                    "ModelApprovalStatus": request.get("ModelApprovalStatus", "PendingManualApproval"),
                }
            else:
                path = request["ModelPackageName"]
                if self._store.get("package", path):
                    raise ServiceError("ValidationException", f"Model Package already exists: {path}")
            arn = package["ModelPackageArn"] = f"{self._arn_prefix}:model-package/{path}"
            self._store.put("package", path, package)
            self._store.put("tags", arn, {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])})
            self._announce(package)
            if token:
                self._store.put("token", token, {"request": request, "arn": arn})
        return {"ModelPackageArn": arn}

    def describe_model_package(self, request: Json) -> Json:
        """Return a package by its ARN, or by its own name."""
        return self._package(request["ModelPackageName"])

    def list_model_packages(self, request: Json) -> Json:
        """Return summaries, filtered and paged. Without a group and a type, these are unversioned packages, as on AWS."""
        group, kind = request.get("ModelPackageGroupName"), request.get("ModelPackageType", "Unversioned")
        if group:
            group = self._group(group)["group"]["ModelPackageGroupName"]
        wanted = [
            package
            for package in self._packages()
            if (
                package.get("ModelPackageGroupName") == group
                if group
                else kind == "Both" or (kind == "Versioned") == ("ModelPackageGroupName" in package)
            )
            and request.get("ModelApprovalStatus") in (None, package.get("ModelApprovalStatus"))
        ]
        result = page(wanted, request, "ModelPackageName")
        result["ModelPackageSummaryList"] = [fitting("ModelPackageSummary", item) for item in result.pop("items")]
        return result

    def update_model_package(self, request: Json) -> Json:
        """Change a versioned package's approval, metadata, or inference specifications."""
        with self._store.transaction():
            package = self._package(request["ModelPackageArn"])
            if "ModelPackageGroupName" not in package:
                raise ServiceError("ValidationException", f"{request['ModelPackageArn']} is not a versioned model package.")
            properties = package.get("CustomerMetadataProperties", {}) | request.get("CustomerMetadataProperties", {})
            for key in request.get("CustomerMetadataPropertiesToRemove", []):
                properties.pop(key, None)
            package |= fitting("DescribeModelPackageOutput", request)
            if properties or "CustomerMetadataProperties" in package:
                package["CustomerMetadataProperties"] = properties
            if more := request.get("AdditionalInferenceSpecificationsToAdd"):
                package.setdefault("AdditionalInferenceSpecifications", []).extend(more)
            for member, most in (
                ("CustomerMetadataProperties", MOST_PROPERTIES),
                ("AdditionalInferenceSpecifications", MOST_SPECIFICATIONS),
            ):
                if len(package.get(member, ())) > most:
                    raise ServiceError("ValidationException", f"A model package has at most {most} {member}.")
            package |= {"LastModifiedTime": time.time(), "LastModifiedBy": self._creator}
            self._store.put("package", path_of(package["ModelPackageArn"]), package)
            self._announce(package, [member for member in request if member not in ("ModelPackageArn", "ClientToken")])
        return {"ModelPackageArn": package["ModelPackageArn"]}

    def delete_model_package(self, request: Json) -> Json:
        """Delete a package."""
        with self._store.transaction():
            package = self._package(request["ModelPackageName"])
            self._announce(package | {"ModelPackageStatus": "Deleting", "LastModifiedTime": time.time()})
            self._store.delete("package", path_of(package["ModelPackageArn"]))
            self._store.delete("tags", package["ModelPackageArn"])
        return {}

    def _announce(self, package: Json, updated: Sequence[str] = ()) -> None:
        group = package.get("ModelPackageGroupName")  # a version has its group's tags
        owner = f"{self._arn_prefix}:model-package-group/{group}" if group else package["ModelPackageArn"]
        self._store.enqueue(package_event(package, self._store.get("tags", owner) or {}, updated))

    def _packages(self) -> list[Json]:
        return self._store.all("package")

    def _group(self, name_or_arn: str) -> Json:
        name = name_or_arn.rpartition("/")[2]
        if record := self._store.get("group", name):
            return record
        raise not_found(f"Model Package Group {name} does not exist")

    def _package(self, name_or_arn: str) -> Json:
        if package := self._store.get("package", path_of(name_or_arn)):
            return package
        raise not_found(f"ModelPackage {name_or_arn} does not exist.")
